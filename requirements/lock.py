"""Turn pip's resolution report (standard input) into a lock: one exact pin a line.

`make lock` runs it. Local version labels (`+cpu`) are dropped, so that the pin
names the release and pip picks the build that its index offers.
"""

import json
import re
import sys

report = json.load(sys.stdin)
pins = {
    re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(): item["metadata"]["version"].split(
        "+"
    )[0]
    for item in report["install"]
    if "dir_info" not in item["download_info"]
}
print("# Exact pins of everything installed. Made by `make lock`; don't edit by hand.")
for name, version in sorted(pins.items()):
    print(f"{name}=={version}")
