"""Versions in, students and scores out."""
