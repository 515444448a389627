"""Distilling a teacher into a student: data, training, evaluation and the report."""
