"""General-purpose tools that torch lacks. Nothing here knows about hosts or methods."""
