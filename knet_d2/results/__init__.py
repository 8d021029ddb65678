"""What a model finds in an image: segments, their files and their pictures."""
