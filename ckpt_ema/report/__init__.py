"""What people read: a plan, a result, progress."""
