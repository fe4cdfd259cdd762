"""Every number of FedSEA's documentation, measured again: the package behind `fedsea bench`.

`command` has the options, `topics` the table of what each bench measures: every topic is a function of a `Workbench`
(block server, whole model, prompts) that yields a `Line` for each figure: value, target, and whether it holds. Each
topic has a file; `training_case`, `privacy_case`, `privacy_point` and `peak` are what several of them share, `link` is
the TCP link that they measure on, and `quality` is the one bench that takes hours and keeps what it has.

The package `fedsea` does not import this one: it finds `command.app` by an entry point of the group `fedsea.commands`.
"""
