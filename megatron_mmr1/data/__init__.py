"""From files to prompts: images, chat templates, parquet rows, and the embedded digits task."""
