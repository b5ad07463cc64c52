"""The cold tier: PostgreSQL."""
