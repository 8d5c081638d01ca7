"""Child processes: how they are started, talk to their parent, are watched, and end."""
