"""The report's pages on a local server, with the language model and the SAEs loaded."""
