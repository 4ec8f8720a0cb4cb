"""Planning: what a run would take, before it is paid for."""
