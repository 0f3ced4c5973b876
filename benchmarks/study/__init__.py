"""A study that anyone can rerun: methods against sparsities on three tasks, and the paper's arguments tested."""
