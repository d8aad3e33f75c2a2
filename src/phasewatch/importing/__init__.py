"""Import telemetry that other programs recorded: tables by a mapping file, and CIS490 stores."""
