"""Every broken and hostile folder: its name, the file and words that the message has, and how it is
broken."""

from harness.tests.hostile import base_rows, config_rows, stack_rows, tensors_rows, weights_rows

GROUPS = {
    "weights": weights_rows.ROWS,
    "tensors": tensors_rows.ROWS,
    "config": config_rows.ROWS,
    "base": base_rows.ROWS,
    "stack": stack_rows.ROWS,
}
ROWS = [(f"{group}: {row[0]}", *row[1:]) for group, rows in GROUPS.items() for row in rows]
