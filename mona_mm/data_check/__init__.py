"""The check of a config's data before anything is built, and the report of what they hold."""
