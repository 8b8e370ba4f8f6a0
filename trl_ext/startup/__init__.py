"""What is refused, loaded and reported before the first step."""
