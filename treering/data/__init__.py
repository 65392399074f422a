"""From files to examples: read, check, deduplicate, store."""
