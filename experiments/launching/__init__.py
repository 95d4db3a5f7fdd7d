"""What happens around the jobs of a launch: rows, stacks, studies, failed jobs, leftover jobs, the report."""
