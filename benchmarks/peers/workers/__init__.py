"""Workers that run in the Pythons of other projects: the standard library, numpy and the project itself."""
