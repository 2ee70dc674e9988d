// OpenAI's own client for Node, unmodified, against `bitnet serve`: what openai_python.py checks, in short.
//
//     openai_node.mjs BITNET FOLDER        FOLDER is where npm has put `openai`
import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const [bitnet, folder] = process.argv.slice(2);
const require = createRequire(join(folder, "node_modules", "x.js"));
const OpenAI = require("openai");
const TEXT = "Once upon a time";
const MESSAGE = "Tell me a story about a cat.";
const KEY = "a-key-of-this-check";
const LENGTH = 24; // tokens of most answers
const PATIENCE = 60_000; // ms, on a busy machine

const messages = [{ role: "user", content: MESSAGE }];
const chat = { model: "default", messages, temperature: 0, max_completion_tokens: LENGTH };
const text = { model: "default", prompt: TEXT, temperature: 0, max_tokens: LENGTH };
const unending = { ...text, temperature: 1, n: 16, max_tokens: 480, logit_bias: { 1: -100, 2: -100 } };
const pet = {
    type: "object",
    properties: { kind: { enum: ["cat", "dog"] }, is_small: { type: "boolean" } },
    required: ["kind", "is_small"],
    additionalProperties: false,
};

function said(arguments_, input) {
    const run = spawnSync(bitnet, arguments_, { input, encoding: "utf8" });
    assert.equal(run.status, 0, `${arguments_.join(" ")}: ${run.stderr}`);
    return run.stdout;
}

function generated(prompt, ...flags) {
    return JSON.parse(said(["generate", "--quiet", "--json", "--max-new-tokens", String(LENGTH), ...flags, prompt])).text;
}

function replied(message) {
    const scratch = mkdtempSync(join(tmpdir(), "bitnet-clients-"));
    try {
        const saved = join(scratch, "chat.json");
        const flags = ["--quiet", "--no-history", "--temperature", "0", "-n", String(LENGTH)];
        said(["chat", ...flags], `${message}\n/save ${saved}\n`);
        return JSON.parse(readFileSync(saved, "utf8")).at(-1).content;
    } finally {
        rmSync(scratch, { recursive: true });
    }
}

async function serving(flags, environment, use) {
    const options = { stdio: ["ignore", "pipe", "inherit"], env: { ...process.env, ...environment } };
    const server = spawn(bitnet, ["serve", "--quiet", "--port", "0", ...flags], options);
    const ended = new Promise((resolve) => server.on("exit", resolve));
    try {
        const { value: first } = await createInterface(server.stdout)[Symbol.asyncIterator]().next();
        assert.match(first ?? "", /^listening on /);
        const base = first.split(" ").at(-1);
        await until("the server is ready", async () => (await fetch(`${base}/ready`)).ok);
        await use(base);
    } finally {
        server.kill("SIGTERM");
    }
    assert.equal(await ended, 0, "status of the server's end");
}

async function until(what, isSo) {
    const deadline = Date.now() + PATIENCE;
    while (!(await isSo())) {
        assert.ok(Date.now() < deadline, `${what}: not so after ${PATIENCE / 1000} s`);
        await sleep(50);
    }
}

async function collected(stream) {
    const all = [];
    for await (const piece of stream) all.push(piece);
    return all;
}

function client(base, options) {
    return new OpenAI({ baseURL: `${base}/v1`, apiKey: KEY, maxRetries: 0, timeout: PATIENCE, ...options });
}

async function answers(base) {
    const openai = client(base);
    const reply = replied(MESSAGE);
    assert.equal((await openai.chat.completions.create(chat)).choices[0].message.content, reply);
    const stream_options = { include_usage: true };
    const pieces = await collected(await openai.chat.completions.create({ ...chat, stream: true, stream_options }));
    assert.equal(pieces.map((piece) => piece.choices[0]?.delta.content ?? "").join(""), reply);
    assert.ok(pieces.at(-1).usage.completion_tokens > 0);
    const whole = (await openai.completions.create({ ...text, echo: true, logprobs: 0 })).choices[0];
    assert.equal(whole.text, TEXT + generated(TEXT, "--temperature", "0"));
    assert.equal(whole.logprobs.token_logprobs[0], null);
    const hot = await openai.completions.create({ ...text, temperature: 1, seed: 7, n: 2 });
    const seeded = ["7", "8"].map((seed) => generated(TEXT, "--temperature", "1", "--seed", seed));
    assert.deepEqual(hot.choices.map((choice) => choice.text), seeded);

    const json_schema = { name: "pet", schema: pet, strict: true };
    const formed = { ...chat, max_completion_tokens: 80, response_format: { type: "json_schema", json_schema } };
    const { parsed } = (await openai.chat.completions.parse(formed)).choices[0].message;
    assert.ok(["cat", "dog"].includes(parsed.kind) && typeof parsed.is_small === "boolean");

    const tools = [{ type: "function", function: { name: "find_pet", parameters: pet, strict: true } }];
    const calling = { ...chat, tools, tool_choice: "required", parallel_tool_calls: false, max_completion_tokens: 200 };
    const called = (await openai.chat.completions.create(calling)).choices[0];
    assert.equal(called.finish_reason, "tool_calls");
    const final = await openai.chat.completions.stream(calling).finalChatCompletion();
    const [call, streamed] = [called, final.choices[0]].map((choice) => choice.message.tool_calls[0].function);
    assert.equal(call.name, "find_pet");
    assert.deepEqual([streamed.name, streamed.arguments], [call.name, call.arguments]);
    assert.ok(["cat", "dog"].includes(JSON.parse(call.arguments).kind));

    const [packed, plain] = await Promise.all(
        [{}, { encoding_format: "float" }].map((more) => openai.embeddings.create({ model: "default", input: TEXT, ...more })),
    );
    // Numbers in JSON are the shortest that are the same in f32.
    assert.deepEqual(packed.data[0].embedding, Array.from(Float32Array.from(plain.data[0].embedding)));
    assert.equal((await openai.models.retrieve("default")).id, "default");
    assert.deepEqual((await collected(await openai.models.list())).map((model) => model.id), ["default"]);

    const asked = { model: "default", input: MESSAGE, temperature: 0, max_output_tokens: LENGTH };
    assert.equal((await openai.responses.create(asked)).output_text, reply);
    const events = await collected(await openai.responses.create({ ...asked, stream: true }));
    assert.equal(events.map((event) => (event.type === "response.output_text.delta" ? event.delta : "")).join(""), reply);

    await assert.rejects(openai.chat.completions.create({ ...chat, temperature: -1 }), (error) => {
        return error instanceof OpenAI.BadRequestError && error.param === "temperature";
    });
    await assert.rejects(openai.models.retrieve("none"), OpenAI.NotFoundError);
}

async function goings(base) {
    const engine = async () => (await (await fetch(`${base}/stats`)).json()).engine;
    const before = (await engine()).new_tokens;
    const stream = await client(base).completions.create({ ...unending, stream: true });
    for await (const _ of stream) break; // which ends it
    await until("running texts are 0", async () => (await engine()).running === 0);
    assert.ok((await engine()).new_tokens - before < 16 * 480, "all tokens were made for nobody");
}

async function refusals(base) {
    await assert.rejects(collected(client(base, { apiKey: "wrong" }).models.list()), OpenAI.AuthenticationError);
    const ask = (options) => client(base, options).completions.create({ ...text, max_tokens: 1 });
    const used = async () => {
        for (let count = 0; count < 200; count++) await ask();
    };
    await assert.rejects(used, (error) => {
        return error instanceof OpenAI.RateLimitError && Number(error.headers.get("retry-after")) >= 1;
    });
    assert.ok((await ask({ maxRetries: 5 })).choices[0].text);
}

await serving([], {}, async (base) => {
    await answers(base);
    await goings(base);
});
await serving(["--requests-per-minute", "60"], { BITNET_API_KEYS: `ann:${KEY}` }, refusals);
const { version } = JSON.parse(readFileSync(join(folder, "node_modules", "openai", "package.json"), "utf8"));
console.log(`   openai ${version} of npm: as \`bitnet generate\` and \`bitnet chat\``);
