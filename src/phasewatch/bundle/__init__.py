"""The bundle format: one episode as a deterministic `.tar.zst` file, and its data model."""
