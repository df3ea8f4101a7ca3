"""The pages of results: their tables, pictures and templates."""
