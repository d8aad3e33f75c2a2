"""Evaluation: predictions to metrics with session-bootstrap intervals, calibration, alarms and importance."""
