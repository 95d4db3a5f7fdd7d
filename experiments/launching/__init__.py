"""What happens around the jobs of a launch: stacks, studies, failed jobs, runs left to other processes."""
