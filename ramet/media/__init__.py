"""What a video is: containers, frames, pictures, drawn clips."""
