"""The step-time study: is a mixture of experts worth it on this machine, at equal time per training step?

After Du et al., arXiv:2405.15052: what a model costs is its measured training step, not its FLOPs, and each is trained
on a budget that follows from its active parameters. Reading order: plan, presets (which models), contender (how one is
built), timing, matching (equal step times), training, ranges, anatomy (where a step goes), inference, results, answer,
study (the whole job), pictures, report, console (what comes out), mesh, projection (over ranks).
"""
