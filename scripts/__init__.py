"""Scripts that measure, train and check; every folder of results/ was written by one of them.

Run them as files. Each puts the repository first on ``sys.path``, so that ``scripts.report`` and the modules that a room shares
have the same names there as in the tests.
"""
