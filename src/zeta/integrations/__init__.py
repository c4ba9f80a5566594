"""Other libraries' plug-in points; each module here is imported by its name."""
