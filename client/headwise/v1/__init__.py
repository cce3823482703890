"""Generated from proto/headwise/v1 by scripts/generate_stubs.py."""
