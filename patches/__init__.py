"""The pull request that gives OpenCLIP a plugin point, one file for each supported version."""
