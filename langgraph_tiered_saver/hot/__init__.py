"""The hot tier: Redis or Valkey."""
