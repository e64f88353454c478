"""Videos: their frames by time, read from video files and images, and synthetic clips."""
