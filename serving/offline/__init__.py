"""What jobs over files take from the service: its protocol's lines, and its servers."""
