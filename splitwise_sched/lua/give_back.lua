-- give_back: an instance cannot go on with a run. Its front end puts the request back, or it ends as failed.
--   KEYS     request:<id>, queue, deadlines, counters
--   ARGV[2]  request id      [3] epoch      [4] instance      [5] why      [6] "retry" | "fail"      [7] ms of retention
--   ARGV[8]  "pair": KV did not get from its prefill to its decode instance
--   returns  1 | 0: this run was over already, or is no longer this instance's
--            | {prefill, decode, ms for which that pair is avoided from now on}
--
-- A pair that fails FAILURES times in WINDOW_MS is avoided by bind for a while, which doubles whenever it fails again
-- within twice that time afterwards. Both ends may tell of a failure: the second is stale by then.
--   pair:<prefill>|<decode>   HASH that expires: failures, since_ms, why; cool_down_ms, avoided_until_ms
--   instance:<prefill>        avoids_until_ms: until then bind has to look at its pairs

local FAILURES, WINDOW_MS, FIRST_MS, LONGEST_MS = 3, 30000, 5000, 120000

local function pair_failed(prefill, decode, why)
  local now, key = now_ms(), P .. 'pair:' .. prefill .. '|' .. decode
  local v = redis.call('HMGET', key, 'failures', 'since_ms', 'cool_down_ms', 'avoided_until_ms')
  local failures, since = tonumber(v[1]) or 0, tonumber(v[2]) or now
  local cool_down, until_ms = tonumber(v[3]) or 0, tonumber(v[4]) or 0
  -- What was under way when it began to be avoided says nothing new.
  if until_ms > now then return nil end
  if now - since > WINDOW_MS then failures, since = 0, now end
  redis.call('HSET', key, 'failures', failures + 1, 'since_ms', since, 'why', cut(why))
  if failures + 1 < FAILURES and cool_down == 0 then
    redis.call('PEXPIRE', key, WINDOW_MS)
    return nil
  end
  cool_down = math.min(math.max(2 * cool_down, FIRST_MS), LONGEST_MS)
  redis.call('HSET', key, 'cool_down_ms', cool_down, 'avoided_until_ms', now + cool_down)
  redis.call('PEXPIRE', key, 3 * cool_down)
  local lease = redis.call('HMGET', P .. 'instance:' .. prefill, 'role', 'avoids_until_ms')
  if lease[1] and (tonumber(lease[2]) or 0) < now + cool_down then
    redis.call('HSET', P .. 'instance:' .. prefill, 'avoids_until_ms', now + cool_down)
  end
  count('pairs_avoided')
  return cool_down
end

local id, r = ARGV[2], load(ARGV[2])
if not r or r.epoch ~= ARGV[3] or not (r.state == 'queued' or is_with(ARGV[4], r)) then return 0 end
if ARGV[6] == 'retry' then
  lose(id, r, ARGV[4], ARGV[5])
else
  terminate(id, r, 'failed', ARGV[5], tonumber(ARGV[7]))
end
if ARGV[8] == 'pair' and r.state == 'prefill' and r.prefill ~= r.decode then
  local cool_down = pair_failed(r.prefill, r.decode, ARGV[5])
  if cool_down then return {r.prefill, r.decode, cool_down} end
end
return 1
