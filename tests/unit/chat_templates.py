"""Short chat templates with the features of the families' own: what each is named for."""

# ruff: noqa: E501

# Llama 3: a date, tools in the system message, JSON with indent, a role of its own for results.
LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|system|>Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}{% for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}{% endif %}
{{- system_message }}{{- "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|assistant|>{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|end|>' }}
    {%- else %}
        {{- "<|ipython|>" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

# Qwen 3: namespaces, reversed loops, thoughts cut out of old answers, a switch for thinking.
QWEN = """{%- if tools %}
    {{- '<|system|>' }}{% for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}{{- '<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content and loop.index0 <= ns.last %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
        {{- '<|assistant|>' + content }}
        {%- if message.reasoning_content %}{{- '[' + message.reasoning_content + ']' }}{% endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '<tool_call>{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{% else %}{{- tool_call.arguments | tojson }}{% endif %}{{- '}</tool_call>' }}
        {%- endfor %}{{- '<|end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|user|>' }}{% endif %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|end|>\\n' }}{% endif %}
    {%- else %}{{- '<|' + message.role + '|>' + message.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>' }}{% endif %}
{%- endif %}"""

# Mistral: strict alternation, ids of nine characters, tools before the last user message.
MISTRAL = """{%- set loop_messages = messages %}
{%- if messages[0]["role"] == "system" %}{% set system_message = messages[0]["content"] %}{% set loop_messages = messages[1:] %}{% endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}{% set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{% set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}{{- '"' + key + '": ' + (val | tojson) }}{% if not loop.last %}{{- ", " }}{% endif %}{% endfor %}
                {{- "}}" }}{% if not loop.last %}{{- ", " }}{% else %}{{- "]" }}{% endif %}{% endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{% endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{% endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{% if not loop.last %}{{- ", " }}{% else %}{{- "]" + eos_token }}{% endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}{{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

# Gemma: no system role, the assistant is called model.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<|' + role + '|>' + message['content'] | trim + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<|model|>'}}{% endif %}"""

# GPT-OSS: macros, channels, loop controls, effort as an argument, thoughts of calls only.
HARMONY = """{%- macro typed(param) -%}
    {%- if param.type == "array" -%}{{- typed(param["items"]) + "[]" -}}{%- else -%}{{- param.type -}}{%- endif -%}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}
{{- "<|system|>Current date: " + strftime_now("%Y-%m-%d") + "\\nReasoning: " + reasoning_effort }}
{%- for tool in tools or [] %}{{- "\\ntype " + tool.function.name + " = (" }}
    {%- for name, param in tool.function.parameters.properties.items() %}{{- name + ": " + typed(param) }}{% if not loop.last %}{{- ", " }}{% endif %}{% endfor %}{{- ")" }}
{%- endfor %}{{- "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.role == "assistant" and "tool_calls" in message %}
        {%- if message.thinking %}{{- "<|assistant|>analysis:" + message.thinking + "<|end|>" }}{% endif %}
        {{- "<|assistant|>commentary to=functions." + message.tool_calls[0].function.name + ":" + message.tool_calls[0].function.arguments|tojson + "<|call|>" }}
    {%- elif message.role == "assistant" %}
        {%- generation %}{{- "<|assistant|>final:" + message.content }}{{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}{%- endgeneration %}
    {%- else %}{{- "<|" + message.role + "|>" + message.content + "<|end|>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|assistant|>" }}{% endif %}"""

# DeepSeek: prints the JSON text of a call as it came.
DEEPSEEK = """{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{%- elif message['role'] == 'assistant' and message['tool_calls'] %}{%- for tool in message['tool_calls'] %}{{ '<|assistant|>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments'] + '\\n```<|end|>' }}{%- endfor %}{%- elif message['role'] == 'tool' %}{{ '<|tool|>' + message['content'] }}{%- else %}{{ '<|assistant|>' + message['content'] + eos_token }}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# GLM-4: newlines around roles, content that is a list of parts.
GLM = """[gMASK]<sop>{%- if tools is defined and tools %}<|system|>
{% for tool in tools %}## {{ tool.function.name }}
{{ tool.function | tojson(indent=4, ensure_ascii=False) }}
{% endfor %}{% endif %}{% for item in messages %}<|{{ item['role'] }}|>
{% if item['content'] is string %}{{ item['content'] }}{% else %}{% for part in item['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

# Granite: documents beside tools. Cohere: one template by name for tools, another for the rest.
GRANITE = """{%- if documents %}{% for document in documents %}<|document|>{{ document.title }}: {{ document['text'] }}
{% endfor %}{% endif %}{% if tools %}<|tools|>{{ tools | tojson(indent=4) }}<|end|>
{% endif %}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if controls and controls.length %}[{{ controls.length }}]{% endif %}{% endif %}"""
COHERE = {
    "default": "{% for m in messages %}<|{{ m.role | upper }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|CHATBOT|>{% endif %}",
    "tool_use": "{% for t in tools %}def {{ t.function.name }}: {% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
    "rag": "{% for d in documents %}{{ d.text }}{% endfor %}",
}
# Phi-3: a stray newline here and there, and the end token in place of a prompt.
PHI = "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] and message['content'] %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
