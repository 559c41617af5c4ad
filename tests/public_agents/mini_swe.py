"""`mini-swe-agent` with a local shell in the working folder: ``mini_swe.py chat``; each task is a conversation of its own. See ``openai_sdk.py``."""

import json
import os

os.environ["MSWEA_SILENT_STARTUP"] = "1"
os.environ["MSWEA_COST_TRACKING"] = "ignore_errors"

import yaml
from minisweagent.agents.default import DefaultAgent
from minisweagent.config import builtin_config_dir
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

config = yaml.safe_load((builtin_config_dir / "mini.yaml").read_text())
answers, error = [], None
for task in json.loads(os.environ["AGENT_TASKS"]):
    model = LitellmModel(
        model_name="openai/policy", **{k: v for k, v in config["model"].items() if k != "model_name"}
    )
    known = {key: value for key, value in config["agent"].items() if key not in ("mode", "confirm_exit")}
    agent = DefaultAgent(model, LocalEnvironment(cwd=os.getcwd()), **known)
    try:
        answers.append(str(agent.run(task)))
    except Exception as failure:
        error = type(failure).__name__
        break
print(json.dumps({"answers": answers, "error": error}))
