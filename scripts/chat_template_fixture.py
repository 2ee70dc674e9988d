"""Writes tests/fixtures/chat_templates.json.gz: chat templates in the styles of well-known models, rendered by transformers.

Run with transformers and jinja2 installed: python scripts/chat_template_fixture.py | gzip -9n > tests/fixtures/chat_templates.json.gz
"""

import json

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATES = {
    "bitnet": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}""",
    "llama3": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if tools is not none %}{{- raise_exception('no tools here') }}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% if messages[0].role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
    {% if add_generation_prompt %}
<|im_start|>assistant
    {%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported: " ~ message.role) }}
    {%- endif %}
{%- endfor %}
""",
    "falcon": """{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{% if message['role'] == 'system' %}{{ 'System: ' + message['content'].strip() }}{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'].strip().replace('\\r\\n', '\\n').replace('\\n\\n', '\\n') }}{% elif message['role'] == 'assistant' %}{{ 'Falcon: ' + message['content'].strip() }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "reasoning": """{%- set ns = namespace(multi_step=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "json": """{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ messages | map(attribute='content') | list | tojson(ensure_ascii=true, separators=(',', ':')) }}
{{ {'z': [1, 2.5, none, true, {}, []], 'a': 'b', 3: (1, 'é')} | tojson(indent=4, sort_keys=false) }}
{{ {'b': 1, 'a': {'d': '</script>', 'c': "it's"}} | tojson(sort_keys=true, indent='\\t') }}
""",
    "loop controls": """{% for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{{- loop.index ~ '/' ~ loop.length ~ ' ' ~ message.role ~ (': ' if not loop.last else '. ') }}
{%- if loop.index > 2 %}{% break %}{% endif %}
{%- else %}nobody{% endfor %}
""",
    "macros": """{%- macro turn(role, content, end='<end>') -%}
<{{ role }}>{{ caller() if caller is defined else '' }}{{ content }}{{ end }}
{%- endmacro -%}
{%- for message in messages -%}
{{ turn(message.role, message.content | trim) }}
{%- endfor %}
{% call turn('assistant', '', end='') %}go{% endcall %}

""",
    "generation": """{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- generation -%}
{%- set shout = m.content | upper %}
{{ shout }}{{ eos_token }}
{%- endgeneration %}
{% else %}
<|{{ m.role }}|> {{ m.content }}
{% endif %}
{%- endfor %}
{{ shout is defined }}
""",
    "python": """{% for m in messages %}
{% set c = m.content | trim %}
[{{ c }}]{{ m.content.strip() == c }}{{ m.content.split() | length }}
{{ c.capitalize() }}|{{ c | title }}|{{ c.title() }}
{{ c.split() }}|{{ c.rsplit(None, 1) }}|{{ c.split(' ', 1) | length }}
{{ c.splitlines() }}|{{ c.lower().upper() }}|{{ c.partition(' ') }}
{{ m.keys() | list }}|{{ m.get('name', 'anon') }}|{{ m.get('name') }}|{{ c[:3] }}|{{ c[::-1][:4] }}
{{ c.removeprefix(' ').removesuffix('!') }}|{{ '-'.join(m.content.strip().split()) }}|{{ c.find('e') }}
{% endfor %}
{{ true }} {{ none }} {{ [1, 'a', none] }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 1 / 2 }} {{ 'ab' * 2 }} {{ 'x' ~ 1 ~ true }}""",
    "undefined": """{{ pad_token }}[{{ messages[0].name }}]{{ messages[0]['name'] is defined }}{{ messages[7] is defined }}
{%- if messages[0].tool_calls %}x{% endif %}{% for x in nothing %}x{% endfor %}{{ nothing | default('d') }}{{ unk_token is not defined }}
""",
    "undefined attribute": """
{{ messages[0].name.first }}
""",
    "undefined concatenation": "{{ pad_token + 'x' }}",
    "white space": """
  {# a comment #}
  {% if true %}
    kept  
  {% endif %}
\t{%- if true %}  x{% endif +%}
{%+ if true %}y{% endif %}

  {{- ' z ' -}}

  end  
""",
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": "\x1c hÉLLO  wörld, don't 🙂\n\n\u3000\x1f"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "a\r\n\r\nb <b>\"c\"</b> \\ 日本!"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nok"},
        {"role": "user", "content": "bye"},
    ],
    [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
]


def render(template, messages, add_generation_prompt):
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **SPECIAL_TOKENS
        )
        return {"text": rendered[0]}
    except jinja2.exceptions.UndefinedError:
        return {"error": "is undefined"}  # the engines' words differ
    except jinja2.exceptions.TemplateError as error:
        return {"error": error.message}


def main():
    cases = [
        {"name": name, "template": template, "renderings": [[render(template, chat, p) for p in (False, True)] for chat in CHATS]}
        for name, template in TEMPLATES.items()
    ]
    versions = {"jinja2": jinja2.__version__, "transformers": transformers.__version__}
    fixture = {"versions": versions, "special_tokens": SPECIAL_TOKENS, "chats": CHATS, "cases": cases}
    print(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")))


main()
