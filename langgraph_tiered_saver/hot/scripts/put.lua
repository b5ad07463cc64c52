-- Acknowledge a checkpoint: append its record to the journal and, if it is the latest, make it the hot one.
-- KEYS: hot hash, journal, namespaces, dirty, clock, tails
-- ARGV: thread, record, unchanged channels {channel, version, ...} (framed; '' = the record is complete),
--       removed channels (framed), number of blobs, ttl in ms ('0' = none)
-- Returns {sequence number, the previous record's}, or {} when the record must carry every channel.
local hot = KEYS[1]
local record = unframe(ARGV[2])
local ns, id, parent = record[2], record[3], record[4]
local known = redis.call('HMGET', hot, 'id', 'u', 'wn', 'p', 'l')
local current = known[1]

if ARGV[3] ~= '' then
  -- PostgreSQL is sure to have, or to get first, only what the hot parent was built from.
  if not current or current ~= parent then return {} end
  local unchanged = unframe(ARGV[3])
  local names = {}
  for i = 1, #unchanged, 2 do names[#names + 1] = 'v:' .. unchanged[i] end
  for first = 1, #names, 1000 do
    local versions = redis.call('HMGET', hot, unpack(names, first, math.min(first + 999, #names)))
    for i = 1, #versions do
      if versions[i] ~= unchanged[2 * (first + i - 1)] then return {} end
    end
  end
end

local reply = append(KEYS[2], KEYS[4], KEYS[5], KEYS[6], ARGV[1], ARGV[2])
if known[5] then redis.call('HDEL', hot, 'l') end
if current and id < current then return reply end

if id ~= current then
  if not current then
    -- Nothing was hot, so writes of this checkpoint that came before it may be in the cold tier only.
    if parent ~= '' or (known[2] and known[2] >= id) then
      redis.call('HSET', hot, 'u', id)
    elseif known[2] then
      redis.call('HDEL', hot, 'u')
    end
  elseif known[2] and known[2] < id then
    redis.call('HDEL', hot, 'u')
  end
end

-- Writes of older checkpoints stay in the cold tier only; so do channels that an incomplete parent left behind.
local complete = ARGV[3] == ''
if tonumber(known[3] or '0') > 0 or (complete and current) then
  local carried = {}
  if complete then
    for i = 7, #record, 3 do carried[record[i]] = true end
  end
  local stale, kept = {}, 0
  local names = redis.call('HKEYS', hot)
  for i = 1, #names do
    local name = names[i]
    local kind = string.sub(name, 1, 2)
    if kind == 'w:' then
      if string.sub(name, 3, string.find(name, '\0', 3, true) - 1) < id then
        stale[#stale + 1] = name
      else
        kept = kept + 1
      end
    elseif complete and (kind == 'v:' or kind == 'b:') and not carried[string.sub(name, 3)] then
      stale[#stale + 1] = name
    end
  end
  for first = 1, #stale, 1000 do
    redis.call('HDEL', hot, unpack(stale, first, math.min(first + 999, #stale)))
  end
  redis.call('HSET', hot, 'wn', kept)
end

-- A checkpoint that is put again keeps its first parent, as PostgresSaver's upsert does.
if id == current then parent = known[4] end
redis.call('HSET', hot, 'id', id, 'p', parent, 'c', record[5], 'm', record[6], 'k', ARGV[5])
local removed = unframe(ARGV[4])
for i = 1, #removed do redis.call('HDEL', hot, 'v:' .. removed[i], 'b:' .. removed[i]) end
for i = 7, #record, 3 do
  redis.call('HSET', hot, 'v:' .. record[i], record[i + 1], 'b:' .. record[i], record[i + 2])
end
if not current then redis.call('SADD', KEYS[3], ns) end
if ARGV[6] ~= '0' then redis.call('PEXPIRE', hot, ARGV[6]) end
return reply
