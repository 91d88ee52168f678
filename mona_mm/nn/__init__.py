"""What torch lacks. Nothing here knows hosts or methods."""
