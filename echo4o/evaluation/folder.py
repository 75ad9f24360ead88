"""The files in the folder of an evaluation. The folder is consistent after a crash at any time.

prompts.jsonl     the prompts as they were read
generation.json   how the images were generated; absent for images of other programs
images/           1.png, 2.png, ... (1_1.png, 1_2.png, ... with several images per prompt)
judge.json        the judge, its settings and questions, and the judged images
records.jsonl     one judgement per line, appended; the last one of an image and aspect counts
detections.jsonl  what the judge `detector` found, by the hash of the image
spending.jsonl    tokens and costs; not part of the result, which is the same for the same inputs
result.json       the scores
report.html       the report of the scores
audit/            the same files of a second judge that judged a share of the prompts; costs.json: what that saved
"""

PROMPTS, GENERATION, JUDGE = "prompts.jsonl", "generation.json", "judge.json"
RECORDS, SPENDING, RESULT, REPORT = "records.jsonl", "spending.jsonl", "result.json", "report.html"
IMAGES, DETECTIONS = "images", "detections.jsonl"
AUDIT, COSTS = "audit", "costs.json"
