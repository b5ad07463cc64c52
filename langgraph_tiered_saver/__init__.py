"""Tiered checkpointing for LangGraph."""
