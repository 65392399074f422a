"""What keys and roles are called in files from elsewhere, in English and in Chinese, and here."""

from __future__ import annotations

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "claude": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "系统": "system",
    "系統": "system",
    "用户": "user",
    "用戶": "user",
    "人类": "user",
    "人類": "user",
    "客户": "user",
    "客戶": "user",
    "助手": "assistant",
    "助理": "assistant",
    "机器人": "assistant",
    "機器人": "assistant",
    "模型": "assistant",
    "客服": "assistant",
    "工具": "tool",
    "观察": "tool",
    "觀察": "tool",
}
"""Whose turn it is."""

CALLING = ("function_call", "tool_call")
"""The roles of turns whose text is a call of a tool, as ShareGPT has them."""

ROW_KEYS = {
    "conversation": "conversations",
    "dialogue": "conversations",
    "dialog": "conversations",
    "对话": "conversations",
    "對話": "conversations",
    "多轮对话": "conversations",
    "会话": "conversations",
    "會話": "conversations",
    "消息": "messages",
    "系统": "system",
    "系統": "system",
    "系统提示": "system",
    "系统提示词": "system",
    "历史": "history",
    "歷史": "history",
    "对话历史": "history",
    "历史对话": "history",
    "指令": "instruction",
    "指示": "instruction",
    "输入": "input",
    "輸入": "input",
    "上下文": "context",
    "背景": "context",
    "输出": "output",
    "輸出": "output",
    "提示": "prompt",
    "提示词": "prompt",
    "补全": "completion",
    "响应": "response",
    "回复": "response",
    "回覆": "response",
    "问题": "question",
    "問題": "question",
    "提问": "question",
    "提問": "question",
    "问": "question",
    "答案": "answer",
    "回答": "answer",
    "解答": "answer",
    "答": "answer",
    "文本": "text",
    "文字": "text",
    "内容": "text",
    "內容": "text",
    "句子": "sentence",
    "语句": "sentence",
    "标签": "label",
    "標籤": "label",
    "标注": "label",
    "类别": "category",
    "類別": "category",
    "分类": "category",
    "分類": "category",
    "意图": "intent",
    "意圖": "intent",
    "选择": "chosen",
    "优选": "chosen",
    "拒绝": "rejected",
    "劣选": "rejected",
}
"""Keys of a row."""

TURN_KEYS = {
    "角色": "role",
    "身份": "role",
    "发言人": "role",
    "内容": "content",
    "內容": "content",
    "文本": "content",
    "消息": "content",
    "值": "value",
}
"""Keys of a turn."""

KEYS = {
    "openai": (("messages",), ()),
    "sharegpt": (("conversations",), ()),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt": (("prompt",), ("completion", "response")),
    "question": (("question",), ("answer",)),
    "label": (("text", "sentence", "utterance", "message", "query"), ("label", "category", "intent")),
}
"""Those that may hold the question of a row and its answer, by what users call such rows."""

PAIR = frozenset({"chosen", "rejected"})
KNOWN_KEYS = PAIR.union(
    ("system", "input", "context", "history", "tools"), *(asked + answer for asked, answer in KEYS.values())
)
KNOWN_TURN_KEYS = frozenset(
    {"role", "from", "content", "value", "type", "name", "tool_call_id", "tool_calls", "weight"}
)
"""Keys of rows and of turns that mean something here."""
