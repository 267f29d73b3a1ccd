"""Time: steps, schedules, accumulation, the optimizer, checkpoints, metrics, the comparison of arms and the report.

Import the module that you need; nothing is imported here, so that readers of finished runs (the report) start
without torch.
"""
