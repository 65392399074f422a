"""Updates by themselves: watch the inbox, follow a schedule or a rule, survive failures.

`loop.Automation(ws).run(stop)` is the loop, for a thread or a process; `treering watch` is nothing but that.
"""
