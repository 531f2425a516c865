"""What is written for people (terminal, Markdown, HTML) and for programs (JSON).

`harness.report.run` holds the report of `lora-stack run`.
"""
