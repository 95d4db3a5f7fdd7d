"""What happens around the jobs of a launch: rows, stacks, studies, failed jobs, runs left to other processes, report."""
