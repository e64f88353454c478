"""Grades and penalties."""
