"""The results of ``kiln bench``: the record of one configuration, its store, and what is said about both."""
