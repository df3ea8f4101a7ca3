"""The report's pages: tables and figures of all SAEs and of each, and the files that hold them."""
