"""Turns records into tables, pictures and pages, and shows progress. It measures nothing."""
