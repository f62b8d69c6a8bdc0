"""A dataset in the layout of TinyAgent's, as its code writes it."""

import json

SYSTEM = "Plan calls of these tools.\n1. send_sms(recipients, message)"


def record(request, plan, system=SYSTEM):
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question: {request}"},
    ]
    planned = {
        "type": "plan",
        "raw_input": str(messages),
        "raw_output": plan,
        "parsed_output": [],
        "id": 0,
        "index": 0,
    }
    joined = {
        "type": "join",
        "raw_input": "[]",
        "raw_output": "Thought: done.\nAction: Finish(ok)",
        "parsed_output": [],
        "id": 1,
        "index": 1,
    }
    return {"input": request, "output": [planned, joined], "closest_5_queries": []}


def sms(number):
    plan = f'1. get_phone_number("Person {number}")\n2. send_sms(["$1"], "Hi")\n'
    return record(f"Text person {number}.", f"{plan}Thought: sent.\n3. join()")


def broken():
    """Malformed in ways of their own, by name."""
    bad = {
        "no-plan": record("Do it.", "I cannot."),
        "no-join": record("Do it.", "1. f()"),
        "no-turns": {"input": "Do it.", "output": []},
        "no-input": {"output": sms(0)["output"]},
        "no-object": "nothing",
        "no-text": record(None, "1. join()"),
        "null-plan": record("Do it.", None),
    }
    code = record("Do it.", "1. join()")
    code["output"][0]["raw_input"] = "__import__('os').abort()"
    cut = record("Do it.", "1. join()")
    cut["output"][0]["raw_input"] = "[{'role': 'system'"
    alone = record("Do it.", "1. join()")
    alone["output"][0]["raw_input"] = "[{'role': 'user', 'content': 'x'}]"
    deep = record("Do it.", "1. join()")
    deep["output"][0]["raw_input"] = "[" * 5000 + "]" * 5000
    bad |= {"deep": deep}
    return bad | {"code": code, "cut": cut, "no-system": alone}


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
