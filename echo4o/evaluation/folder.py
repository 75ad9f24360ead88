"""The folder of an evaluation: what lies where, and how it survives being killed at any moment.

prompts.jsonl     the prompts as they were read
generation.json   how the pictures were drawn; absent for pictures made elsewhere
images/           1.png, 2.png, ... (1_1.png, 1_2.png, ... with several pictures per prompt)
judge.json        who judged, with what settings and questions, and which pictures
records.jsonl     one judgement per line, appended as they come in; the last one about a thing counts
detections.jsonl  what the judge `detector` found, by the hash of the image
spending.json     tokens and costs; not part of the result, which is the same for the same inputs
result.json       the scores
report.html       the scores to look at
audit/            the same files of a second judge that judged a share of the prompts; costs.json: what that saved
"""

PROMPTS, GENERATION, JUDGE = "prompts.jsonl", "generation.json", "judge.json"
RECORDS, SPENDING, RESULT, REPORT = "records.jsonl", "spending.jsonl", "result.json", "report.html"
IMAGES, DETECTIONS = "images", "detections.jsonl"
AUDIT, COSTS = "audit", "costs.json"
