-- resubmit: its front end puts a request back that lost its instance, that Redis no longer knows, or that was cancelled
--           because the front end itself was taken for dead.
--   KEYS     request:<id>, queue, deadlines, counters, incoming:<nonce>, body:<id>
--   ARGV[2]  request id        [3] front end        [4] nonce of the submit
--   ARGV[5]  highest epoch that the front end has seen      [6] ms until it expires      [7] ms of retention
--   ARGV[8]  input tokens (prompt and what was emitted)     [9] KV tokens to reserve     [10] model
--   ARGV[11] attempts at most  [12] attempts that the front end knows of
--   ARGV[13] "1": also when it is done, because its last outputs never came to the front end; "2": also out of the hands
--            of who works on it, because outputs in the middle never came
--   ARGV[14] class             [15] its weight            [16] tenant
--   It was served its share before, so it does not wait in the waiting room again.
--   returns  {"QUEUED", epoch} | {"HELD", state} | {"ENDED", state, reason} | {"FAILED", reason}

-- When Redis has lost the record, an instance may still work on it under an epoch that the front end has not heard of:
-- a claim that is taken back before it was bound goes to another without a word. It takes a lapsed lease each time.
local LEAP = 100

local id, timeout, retain = ARGV[2], tonumber(ARGV[6]), tonumber(ARGV[7])
local r = load(id)
if r and ARGV[13] == '2' and r.epoch == ARGV[5] and (r.state == 'prefill' or r.state == 'decode') then
  lose(id, r, '', 'some of its outputs never came to its front end')
  r = load(id)
end
if r and r.state == 'done' and ARGV[13] == '1' then
  r.epoch = raise_epoch(id)
elseif r and r.state ~= 'lost' and not (r.state == 'cancelled' and redis.call('HGET', KEYS[1], 'orphaned')) then
  redis.call('UNLINK', KEYS[5])
  if is_live(r.state) then return {'HELD', r.state} end
  return {'ENDED', r.state, redis.call('HGET', KEYS[1], 'reason') or ''}
end
local now, epoch, attempts = now_ms(), 0, 0
if r then
  epoch, attempts = tonumber(r.epoch), tonumber(r.attempts)
  if attempts >= tonumber(ARGV[11]) then
    redis.call('UNLINK', KEYS[5])
    local why = 'given up after ' .. attempts .. ' attempts, the last: ' .. (redis.call('HGET', KEYS[1], 'reason') or '')
    terminate(id, r, 'failed', why, retain)
    return {'FAILED', why}
  end
else
  epoch, attempts = tonumber(ARGV[5]) + LEAP, tonumber(ARGV[12])
  redis.call('HSET', KEYS[1], 'created_ms', now)
end
redis.call('RENAME', KEYS[5], KEYS[6])
redis.call('HSET', KEYS[1], 'state', 'queued', 'epoch', epoch, 'attempts', attempts, 'frontend', ARGV[3],
           'nonce', ARGV[4], 'model', ARGV[10], 'input_tokens', ARGV[8], 'kv_tokens', ARGV[9],
           'class', ARGV[14], 'weight', ARGV[15], 'tenant', ARGV[16], 'deadline_ms', now + timeout)
enqueue(id, epoch, {input_tokens = ARGV[8], model = ARGV[10]})
owe(ARGV[14], ARGV[15], tonumber(ARGV[8]))
redis.call('HDEL', KEYS[1], 'finished_ms', 'orphaned')
redis.call('PEXPIRE', KEYS[1], timeout + retain)
redis.call('ZADD', KEYS[3], now + timeout, id)
count('resubmitted')
return {'QUEUED', epoch}
