"""`python -m langgraph_tiered_saver.cli` is `langgraph-tiered`."""

from langgraph_tiered_saver.cli import main

main()
