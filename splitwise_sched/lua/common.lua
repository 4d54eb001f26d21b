-- common: what several scripts do to a request. This text, preferred.lua, waiting_room.lua and rate.lua
-- stand in front of every script; this alone where connection.py says so.
--   ARGV[1]  key prefix of the shard, "pd:{topic:shard}:"
-- Keys that depend on what a record says (who holds the request) are built from the prefix: the hash tag in it keeps
-- them in the slot of the declared ones, and an ACL's key pattern applies to them all the same.

local P = ARGV[1]
local FIELDS = {'state', 'epoch', 'attempts', 'frontend', 'queue_entry', 'prefill', 'decode', 'inbox_entry',
                'kv_reserved', 'kv_tokens', 'input_tokens', 'deadline_ms', 'model', 'class', 'tenant', 'weight',
                'queue', 'prefer'}
local HISTORY_BYTES, REASON_BYTES = 2000, 1000
local leave_room, feed_queue -- waiting_room.lua
local owe -- rate.lua
local forget_preference -- preferred.lua

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local NAN, LARGEST = 0 / 0, 2 ^ 53
local NUMBERS = {'epoch', 'attempts', 'input_tokens', 'kv_tokens', 'deadline_ms', 'weight'}
local TEXTS = {'frontend', 'model', 'class', 'tenant'}

-- what is no number of any use is 0
local function number(x)
  local n = tonumber(x) or 0
  return n > -LARGEST and n < LARGEST and n or 0
end

-- a record that no script of this version wrote: what is wrong with it, and values that do no harm in the place of that
local function mend(r)
  for _, field in ipairs(NUMBERS) do
    local n = tonumber(r[field]) or NAN
    if not (n >= 0 and n < LARGEST) then r.broken, r[field] = field, field == 'weight' and '1' or '0' end
  end
  for _, field in ipairs(TEXTS) do
    if not r[field] then r.broken, r[field] = field, '-' end
  end
  return r
end

-- those fields of a request's record, "state" first, as a table, or nil
local function load_some(id, fields)
  local values = redis.call('HMGET', P .. 'request:' .. id, unpack(fields))
  if not values[1] then return nil end
  local r = {}
  for i = 1, #fields do r[fields[i]] = values[i] or nil end
  return r
end

-- the record, or nil; it has in `broken` a field that is not what it must be
local function load(id)
  local r = load_some(id, FIELDS)
  if not r then return nil end
  local epoch, attempts, input = tonumber(r.epoch) or NAN, tonumber(r.attempts) or NAN, tonumber(r.input_tokens) or NAN
  local kv, deadline, weight = tonumber(r.kv_tokens) or NAN, tonumber(r.deadline_ms) or NAN, tonumber(r.weight) or NAN
  if math.min(epoch, attempts, input, kv, deadline, weight) >= 0
     and epoch + attempts + input + kv + deadline + weight < LARGEST
     and r.frontend and r.model and r.class and r.tenant then
    return r
  end
  return mend(r)
end

-- who has a lower epoch has nothing to say any more
local function raise_epoch(id)
  local key = P .. 'request:' .. id
  local epoch = redis.pcall('HINCRBY', key, 'epoch', 1)
  if type(epoch) == 'number' then return epoch end
  redis.call('HSET', key, 'epoch', 1)
  return 1
end

local function is_live(state)
  return state == 'queued' or state == 'prefill' or state == 'decode' or state == 'lost'
end

-- whether an instance may say how this run goes on; prefill is out of it when decode has begun
local function is_with(instance, r)
  return r.decode == instance and (r.state == 'prefill' or r.state == 'decode')
         or r.prefill == instance and r.state == 'prefill'
end

local function count(what, n)
  return redis.call('HINCRBY', P .. 'counters', what, n or 1)
end

local function set_reserved(instance, tokens, requests)
  redis.call('HSET', P .. 'instance:' .. instance, 'reserved_tokens', tokens, 'reserved_requests', requests)
end

local function set_load(instance, reserved, capacity)
  redis.call('ZADD', P .. 'decode-load', 'XX', string.format('%.6f', reserved / capacity), instance)
end

-- take `tokens` of KV on a live decode instance for one request (negative: give them back)
local function reserve(instance, tokens, requests)
  local v = redis.call('HMGET', P .. 'instance:' .. instance, 'capacity_tokens', 'reserved_tokens', 'reserved_requests')
  local capacity, reserved = number(v[1]), number(v[2]) + tokens
  if capacity <= 0 then return end
  set_reserved(instance, reserved, number(v[3]) + requests)
  set_load(instance, reserved, capacity)
end

-- tell an instance to forget a run; one that is gone has no control stream and is not given a new one
local function drop_from(instance, id, epoch, why)
  redis.call('XADD', P .. 'control:' .. instance, 'NOMKSTREAM', 'MAXLEN', '~', 10000, '*',
             'drop', id, 'epoch', epoch, 'why', why)
end

-- into the common queue, or into the one of an instance ("preferred:<id>"); `also`: more to write into the record
local function enqueue(id, epoch, r, queue, also)
  queue = queue or 'queue'
  local entry = redis.call('XADD', P .. queue, '*', 'id', id, 'epoch', epoch, 'tokens', r.input_tokens, 'model', r.model)
  redis.call('HSET', P .. 'request:' .. id, 'queue_entry', entry, 'queue', queue, unpack(also or {}))
end

local function remove_entry(r)
  local queue = P .. (r.queue or 'queue')
  -- What a record names may be no entry, and no queue.
  redis.pcall('XACK', queue, 'prefill', r.queue_entry)
  redis.pcall('XDEL', queue, r.queue_entry)
end

-- take a request that is bound out of the hands of both: queue entry, inbox entry, KV reservation; legs other than `from`
-- are told
local function unbind(id, r, from, why)
  if r.queue_entry then remove_entry(r) end
  if r.inbox_entry and r.decode then
    redis.pcall('XDEL', P .. 'inbox:' .. r.decode, r.inbox_entry)
    reserve(r.decode, -number(r.kv_reserved), -1)
    if r.decode ~= from then drop_from(r.decode, id, r.epoch, why) end
  end
  if r.prefill and r.state == 'prefill' and r.prefill ~= from and r.prefill ~= r.decode then
    drop_from(r.prefill, id, r.epoch, why)
  end
  redis.call('HDEL', P .. 'request:' .. id, 'queue_entry', 'queue', 'inbox_entry', 'kv_reserved')
end

-- the same, and out of the queues if it waits there
local function let_go(id, r, from, why)
  if r.state == 'queued' then
    if not r.queue_entry then leave_room(id, r) end
    forget_preference(id, r)
    owe(r.class, nil, -tonumber(r.input_tokens))
  end
  unbind(id, r, from, why)
end

-- a front end that is gone has no stream and is not given a new one
local function notify(frontend, id, value)
  redis.call('XADD', P .. 'out:' .. (frontend or ''), 'NOMKSTREAM', 'MAXLEN', '~', '200000', '*', id, value)
end

-- a reason as it is kept and told: what an instance or a user says may be of any length
local function cut(why)
  if #why <= REASON_BYTES then return why end
  return (string.gsub(string.sub(why, 1, REASON_BYTES), '[\194-\244][\128-\191]*$', ''))
end

local function remember(id, line)
  local key = P .. 'request:' .. id
  local history = (redis.call('HGET', key, 'history') or '') .. line .. '; '
  -- Not from the middle of a UTF-8 character on.
  history = string.gsub(string.sub(history, -HISTORY_BYTES), '^[\128-\191]+', '')
  redis.call('HSET', key, 'history', history)
end

-- into its history: how the run under r.epoch ended, where, and when
local function remember_run(id, r, why)
  local places = {prefill = (r.prefill or '?') .. ' -> ' .. (r.decode or '?'), decode = r.decode}
  local created = tonumber(redis.call('HGET', P .. 'request:' .. id, 'created_ms')) or now_ms()
  remember(id, string.format('epoch %s, after %.1f s, in %s%s: %s', r.epoch, (now_ms() - created) / 1000, r.state,
                             places[r.state] and ' on ' .. places[r.state] or '', why))
end

-- the run under r.epoch is over without an answer: its front end is told, and puts the request back
local function lose(id, r, from, why)
  why = cut(why)
  let_go(id, r, from, why)
  local epoch = raise_epoch(id)
  redis.call('HSET', P .. 'request:' .. id, 'state', 'lost', 'reason', why)
  remember_run(id, r, why)
  notify(r.frontend, id, epoch .. ':0::' .. cjson.encode({lost = why}))
  count('lost')
end

-- the request ends for good in `state`; its record stays for retain_ms, with those fields and values in it; how many
-- have ended so
local function close(id, state, why, retain_ms, ...)
  local key = P .. 'request:' .. id
  redis.call('HSET', key, 'state', state, 'reason', why, 'finished_ms', now_ms(), ...)
  redis.call('ZREM', P .. 'deadlines', id)
  redis.call('UNLINK', P .. 'body:' .. id)
  redis.call('PEXPIRE', key, retain_ms)
  return count(state)
end

-- end a request that nobody finished: both legs and its front end are told
local function terminate(id, r, state, why, retain_ms)
  why = cut(why)
  let_go(id, r, '', why)
  local epoch = raise_epoch(id)
  close(id, state, why, retain_ms)
  local finish = state
  if state == 'failed' then
    finish = 'error'
    if is_live(r.state) and r.state ~= 'lost' then remember_run(id, r, why) end
    redis.call('XADD', P .. 'dead-letter', 'MAXLEN', '~', 10000, '*', 'id', id, 'why', why, 'attempts',
               r.attempts or 0, 'frontend', r.frontend, 'history', redis.call('HGET', P .. 'request:' .. id, 'history') or '')
  end
  notify(r.frontend, id, epoch .. ':0::' .. cjson.encode({finish = finish, detail = why}))
  feed_queue()
end
